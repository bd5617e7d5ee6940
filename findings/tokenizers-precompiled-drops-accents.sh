#!/usr/bin/env bash
# tokenizers 0.23.3: its normalizer Precompiled takes the table of a SentencePiece model, which T5,
# UMT5 and many others carry, and is meant to do what SentencePiece does with it. It looks up a
# letter together with the accents that follow as one key, takes the first match and leaves out the
# rest: after a letter that the table changes by itself (full-width ones, ligatures, circled
# figures) every combining accent is dropped without a word. The same prompt so gives other tokens
# than the model was trained with.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q tokenizers==0.23.3 sentencepiece==0.2.3 protobuf==7.36.2
cat > "$place/seen.py" <<'PY'
import io
import unicodedata

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers.normalizers import Precompiled

model = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["the quick brown fox", "jumps over it"] * 20), model_writer=model,
    vocab_size=30, hard_vocab_limit=False, normalization_rule_name="nfkc",
    add_dummy_prefix=False, minloglevel=2,
)
parsed = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
fast = Precompiled(parsed.normalizer_spec.precompiled_charsmap)

texts = {
    "a letter and its accent": "a\u0302b",
    "a full-width letter and its accent": "\uff41\u0302b",
    "a ligature and an accent": "\ufb01\u0301",
    "a circled figure and an accent": "\u2460\u0301",
}
lost = {}
for name, text in texts.items():
    expected, found = theirs.normalize(text), fast.normalize_str(text)
    nfd = [unicodedata.normalize("NFD", each) for each in (expected, found)]
    lost[name] = [sum(map(unicodedata.combining, each)) > 0 for each in nfd] == [True, False]
    print(f"{name}: SentencePiece {expected!a}, tokenizers {found!a}")
assert list(lost.values()) == [False, True, True, True], lost
PY
"$place/venv/bin/python" "$place/seen.py"
