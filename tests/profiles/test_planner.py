"""Properties of plans: within budgets, monotone, determined, and refused only where none exists."""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.engine.families.wan.cost import encoders, transformer, vae
from penstock.engine.families.wan.denoise_plan import (
    RESIDUAL_COST,
    Denoise,
)
from penstock.engine.families.wan.manifest import WanManifest
from penstock.engine.family.protocol import builtin
from penstock.errors import OverBudget
from penstock.profiles.attention_bytes import int8_attention_bytes
from penstock.profiles.cards import described
from penstock.profiles.hardware import Hardware
from penstock.profiles.manifest import VideoShape
from penstock.profiles.phases import (
    CUDA_LIBRARY_BYTES,
    EIGHT_BIT_WORKSPACE_BYTES,
    Case,
    Workload,
    group_fits,
)
from penstock.profiles.plan import Plan
from penstock.profiles.planner import SHRINK, fits, minimum_vram_bytes, plan, smaller, steps
from penstock.profiles.policy import Limits, Policy
from penstock.profiles.prefetch import without_prefetch
from penstock.profiles.rates import Rates
from penstock.profiles.streams import LINK_CARE
from penstock.profiles.tiling import TileGrid
from penstock.units import GIB
from tests.profiles.small import PAGE, machines, manifests, policies, workloads

PLANS = int(os.environ.get("PENSTOCK_PLANS", "100"))
"""Examples a property; 2500 make more than 10,000 plans, in some minutes."""

CHECKED = settings(
    max_examples=PLANS,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def attempt(*given_case: object, **options: object) -> Plan | None:
    try:
        return plan(*given_case, **options)
    except OverBudget:
        return None


@CHECKED
@given(manifests(), workloads, machines, policies, st.none() | st.integers(0, 8 << 20))
def test_within_the_budgets_and_the_same_every_time(model, work, machine, policy, pinned) -> None:
    found = attempt(model, work, machine, policy, pinned_bytes=pinned)
    assert found == attempt(model, work, machine, policy, pinned_bytes=pinned)
    if found is None:
        return
    for phase in found.phases:
        assert phase.vram_bytes <= machine.vram_bytes
        assert phase.ram_bytes <= machine.ram_bytes
        assert phase.pinned_bytes <= (machine.ram_bytes if pinned is None else pinned)
        assert all(count >= 0 for _, count in (*phase.weights, *phase.work, *phase.ram))
    if policy.disk == "never":
        assert found["denoise"].stream.disk_blocks == 0
    assert Plan.from_json(found.to_json()) == found


@CHECKED
@given(
    manifests(), workloads, machines, policies,
    st.sampled_from([(2 << 20, 0), (0, 2 << 20), (3 << 20, 3 << 20)]),
)  # fmt: skip
def test_more_budget_is_never_slower(model, work, machine, policy, more) -> None:
    found = attempt(model, work, machine, policy)
    roomier = replace(
        machine,
        vram_bytes=machine.vram_bytes + more[0],
        ram_bytes=machine.ram_bytes + more[1],
    )
    better = attempt(model, work, roomier, policy)
    if found is None:
        return
    assert better is not None
    # Room that is found for hidden states in fp32 is taken, where it costs no more than this.
    cost = RESIDUAL_COST if found.residual != better.residual else 0
    assert better.seconds <= found.seconds * (1 + 1e-9 + cost)
    if policy.disk != "spare":
        assert _preferred_s(better, model) <= _preferred_s(found, model) * (1 + 1e-9)
    for phase in found.phases:
        if phase.name not in ("context", "denoise"):
            assert better[phase.name].seconds <= phase.seconds * (1 + 1e-9)


def _preferred_s(found: Plan, model: WanManifest) -> float:
    """What is least of the plans there are: hidden states in 16 bits count `RESIDUAL_COST` more. A
    plan of fp32 that is taken for its precision may be that much slower than one of bf16 that less
    room allows, so that seconds alone cannot fall with every byte."""
    seconds = found["context"].seconds + found["denoise"].seconds
    narrow = found.residual == "bf16" and model.transformer.weights.itemsize == 2
    return seconds * (1 + RESIDUAL_COST * narrow)


@CHECKED
@given(
    manifests(), workloads, machines,
    st.sampled_from([(2 << 20, 0), (0, 2 << 20), (3 << 20, 3 << 20)]),
)  # fmt: skip
def test_sparing_the_disk_more_budget_is_never_worse_with_busy_links_weighed(
    model, work, machine, more
) -> None:
    """With disk="spare" seconds alone may grow with the budget, by filling the memory there is;
    what is minimised, seconds and a tenth of the links' busy time, never does."""
    spare = Policy(disk="spare")
    found = attempt(model, work, machine, spare)
    roomier = replace(
        machine,
        vram_bytes=machine.vram_bytes + more[0],
        ram_bytes=machine.ram_bytes + more[1],
    )
    better = attempt(model, work, roomier, spare)
    if found is None:
        return
    assert better is not None
    cost = RESIDUAL_COST if found.residual != better.residual else 0
    before, after = (_weighed(model, work, machine, each) for each in (found, better))
    assert after <= before * (1 + cost) + 1e-9
    narrow = model.transformer.weights.itemsize == 2
    before, after = (
        weighed * (1 + RESIDUAL_COST * (narrow and each.residual == "bf16"))
        for weighed, each in ((before, found), (after, better))
    )
    assert after <= before + 1e-9


def _weighed(model, work, machine, found: Plan) -> float:
    step, blocks = found["denoise"], model.transformer.weights.block_bytes
    passes = work.steps * math.ceil(work.branches / step.branches)
    copied = sum(c for block, c in enumerate(blocks) if block not in step.stream.device_blocks)
    in_ram = sum(blocks[block] for block in step.stream.host_blocks)
    busy_s = copied / machine.rates.copy_bytes_per_s
    busy_s += (copied - in_ram) / machine.rates.read_bytes_per_s
    seconds = found["context"].seconds + step.seconds
    return seconds * (1 - 1e-9) + LINK_CARE * passes * busy_s


@CHECKED
@given(manifests(), workloads, machines)
def test_sparing_the_disk_costs_what_is_said(model, work, machine) -> None:
    spare = Policy(disk="spare")
    found, fastest = attempt(model, work, machine, spare), attempt(model, work, machine)
    if found is None or fastest is None:
        assert found is fastest
        return
    assert found["denoise"].stream is not None and fastest["denoise"].stream is not None
    busy_s = fastest["denoise"].copied_bytes / machine.rates.copy_bytes_per_s
    busy_s += fastest["denoise"].read_bytes / machine.rates.read_bytes_per_s
    assert fastest.seconds <= found.seconds <= fastest.seconds + LINK_CARE * busy_s + 1e-9


def brute_force(model: WanManifest, work: Workload, machine: Hardware, policy: Policy) -> bool:
    """Whether any legal choice at all fits, by plain arithmetic over all of them."""
    ok = [
        _one_pass_fits(
            model.text.weights.block_bytes,
            encoders.text_bytes(model.text, prompts=work.branches),
            model.text.weights.rest_bytes,
            _states(model, work),
            machine,
        )
    ]
    picture = 15 * work.shape.width * work.shape.height
    if model.image is not None:
        ok.append(
            _one_pass_fits(
                model.image.weights.block_bytes,
                encoders.image_bytes(model.image),
                model.image.weights.rest_bytes,
                _states(model, work) + picture,
                machine,
            )
        )
    return all(ok) and _vae_fits(model, work, machine, policy, picture) and _denoise_fits(
        model, work, machine, policy
    )  # fmt: skip


def _states(model: WanManifest, work: Workload) -> int:
    states = work.branches * 512 * model.text.d_model * model.text.weights.itemsize
    if model.image is not None:
        states += model.image.tokens * model.image.hidden_size * model.image.weights.itemsize
    return states


def _libraries(machine: Hardware) -> int:
    return CUDA_LIBRARY_BYTES if machine.device == "cuda" else 0


def _half(cost: vae.VaeBytes, weights: int, machine: Hardware, share: float) -> int:
    """VRAM of one half of the VAE."""
    if machine.device != "cuda":
        return cost.device_bytes + weights
    tensors = cost.device_bytes + cost.convolution_bytes + weights
    return tensors + int(share * tensors) + CUDA_LIBRARY_BYTES


def _one_pass_fits(blocks, work_bytes, rest, held, machine, stays=0) -> bool:
    vram = work_bytes + (stays + max(blocks) if stays else max(rest, max(blocks)))
    vram += _libraries(machine)
    return vram <= machine.vram_bytes and held + max(max(blocks), PAGE) <= machine.ram_bytes


def _vae_fits(model, work, machine, policy, picture) -> bool:
    latent, on_cpu = work.shape.latent(model.vae), machine.device == "cpu"
    grids = [
        TileGrid(rows, columns)
        for rows in range(1, min(latent[1], 8) + 1)
        for columns in range(1, min(latent[2], 8) + 1)
    ]
    if policy.tiles is not None:
        grids = [TileGrid(min(policy.tiles[0], latent[1]), min(policy.tiles[1], latent[2]))]
    volume = latent[0] * latent[1] * latent[2]
    pixels = work.shape.width * work.shape.height
    latents, condition = 64 * volume, 80 * volume
    decode = any(
        _half(cost, model.vae.decoder.rest_bytes, machine, 0.25) <= machine.vram_bytes
        and cost.ram_bytes + latents + _kept_tile(work, latent, grid) + PAGE <= machine.ram_bytes
        for grid in grids
        for cost in (vae.decode_bytes(model.vae, latent, grid, 2, on_cpu=on_cpu),)
    )
    encode = model.transformer.in_channels == 16 or any(
        _half(cost, model.vae.encoder.rest_bytes, machine, 0.4) <= machine.vram_bytes
        and _states(model, work) + picture + condition + PAGE <= machine.ram_bytes
        for cost in (vae.encode_bytes(model.vae, latent, grid, 2, on_cpu=on_cpu) for grid in grids)
    )
    frames = 3 * work.shape.frames * pixels + latents
    return decode and encode and frames + (16 << 20) + 240 * pixels <= machine.ram_bytes


def _kept_tile(work, latent, grid) -> int:
    """Two copies of the pixels of the largest tile, if the job is kept."""
    rows, columns = math.ceil(latent[1] / grid.rows), math.ceil(latent[2] / grid.cols)
    pixels = work.shape.width // latent[2] * columns * work.shape.height // latent[1] * rows
    return 2 * 3 * work.shape.frames * pixels if work.saved else 0


def _denoise_fits(model, work, machine, policy) -> bool:
    spec, latent = model.transformer, work.shape.latent(model.vae)
    tokens = transformer.grid_tokens(spec, latent)
    chunks = range(1, tokens + 1) if policy.chunk_tokens is None else [policy.chunk_tokens]
    visits = (
        {work.branches, 1} if policy.branches is None else {min(policy.branches, work.branches)}
    )
    places = {"auto": (True, False), "vram": (True,), "ram": (False,)}[policy.cross_kv]
    fast = policy.compute == "fast" and machine.rates.eight_bit_flops is not None
    stored = spec.storage
    decoding = stored.scratch_bytes + stored.workspace_bytes
    if fast and stored.format == "int8":
        decoding = EIGHT_BIT_WORKSPACE_BYTES
    volume = latent[0] * latent[1] * latent[2]
    held = _states(model, work) + (spec.in_channels - spec.out_channels) * 4 * volume
    for chunk, visit, place in itertools.product(chunks, visits, places):
        case = transformer.DenoiseCase(
            latent, chunk, work.branches, visit, work.steps,
            model.image.tokens if model.image else 0, cross_kv_on_device=place,
            fused_norms=machine.fused_norms, attention=policy.attention,
            residual="fp32" if policy.residual == "fp32" else "bf16",
        )  # fmt: skip
        kept = held + (0 if place else transformer.cross_kv_bytes(spec, case))
        context = transformer.context_bytes(spec, case).total_bytes + decoding
        restored = max(12 * 64 * volume, 2 * held) if work.saved else 0
        if not _one_pass_fits(
            spec.cross_block_bytes, context, 0, kept + restored, machine, spec.weights.rest_bytes
        ):
            continue
        step = transformer.denoise_bytes(spec, case).total_bytes + decoding + _libraries(machine)
        room = (
            machine.vram_bytes - step - spec.weights.rest_bytes,
            machine.ram_bytes - kept - 64 * volume * (5 if work.saved else 1),
        )
        if _blocks_fit(spec.weights.block_bytes, *room, policy):
            return True
    return False


def _blocks_fit(blocks, vram, ram, policy) -> bool:
    """Every set of residents, not only the evenly spread ones, would do at least as well here."""
    n = len(blocks)
    for on_device in range(n + 1):
        first = [(2 * i + 1) * n // (2 * on_device) for i in range(on_device)]
        left = [block for block in range(n) if block not in first]
        for in_host in range(len(left) + 1):
            second = [left[(2 * i + 1) * len(left) // (2 * in_host)] for i in range(in_host)]
            disk = [block for block in left if block not in second]
            if disk and policy.disk == "never":
                continue
            device = sum(blocks[b] for b in first) + max((blocks[b] for b in left), default=0)
            host = sum(blocks[b] for b in second) + max((blocks[b] for b in disk), default=0)
            if device <= vram and host + (PAGE if first and not disk else 0) <= ram:
                return True
    return False


@CHECKED
@given(manifests(), workloads, machines, policies)
def test_every_refusal_is_right_and_so_is_every_plan(model, work, machine, policy) -> None:
    found = attempt(model, work, machine, policy) is not None
    assert found == brute_force(model, work, machine, policy)
    limits = Limits(machine.vram_bytes, machine.ram_bytes)
    assert found == fits(model, work, machine, policy, limits)


@pytest.mark.parametrize(
    ("vram_gib", "residual", "expected"),
    [
        (3.6, None, "bf16"),  # no room for more
        (5.5, None, "fp32"),  # smaller chunks, which cost 0.1 %
        (11, None, "fp32"),
        (11, "bf16", "bf16"),
        (11, "fp32", "fp32"),
        (3.6, "fp32", None),
    ],
)
def test_hidden_states_are_in_fp32_where_there_is_room(vram_gib, residual, expected) -> None:
    machine = replace(described("RTX 5090 32GB", "64GiB", None), vram_bytes=int(vram_gib * GIB))
    work = Workload(VideoShape(1280, 720, 81), steps=40, guided=True)
    model, policy = builtin("wan2.1-i2v-14b", "int8"), Policy(residual=residual or "auto")
    found = attempt(model, work, machine, policy)
    assert (found and found.residual) == expected
    if found is None or expected == "bf16":
        return
    narrow = plan(model, work, machine, Policy(residual="bf16"))
    assert found["denoise"].seconds <= narrow["denoise"].seconds * (1 + RESIDUAL_COST)
    wide, kept = dict(found["denoise"].work), dict(narrow["denoise"].work)
    visits = found["denoise"].branches, narrow["denoise"].branches
    assert wide["hidden"] / visits[0] == 2 * kept["hidden"] / visits[1]


def test_less_memory_leaves_the_hidden_states_as_they_are_while_it_can() -> None:
    machine = replace(described("RTX 5090 32GB", "64GiB", None), vram_bytes=6 * GIB)
    work = Workload(VideoShape(1280, 720, 81), steps=40, guided=True)
    model, told = builtin("wan2.1-i2v-14b", "int8"), []
    found: Plan | None = plan(model, work, machine)
    while found is not None:
        told.append(found.residual)
        found = smaller(model, work, machine, found, "denoise", "VRAM")
    wide = told.count("fp32")
    assert wide >= 3 and told == ["fp32"] * wide + ["bf16"] * (len(told) - wide)
    assert "bf16" in told


@settings(CHECKED, max_examples=max(10, PLANS // 5))
@given(manifests(), workloads, machines)
def test_one_byte_under_the_least_vram_is_refused(model, work, machine) -> None:
    try:
        least = minimum_vram_bytes(model, work, machine)
    except OverBudget as error:
        assert error.resource == "RAM"
        assert error.need_bytes > error.limit_bytes == machine.ram_bytes
        return
    exact = plan(model, work, replace(machine, vram_bytes=least))
    assert exact.peak_vram_bytes == least
    with pytest.raises(OverBudget) as refused:
        plan(model, work, replace(machine, vram_bytes=least - 1))
    assert refused.value.resource == "VRAM"
    assert refused.value.need_bytes == least
    assert sum(count for _, count in refused.value.consumers) == least
    assert f"--vram {least}" in str(refused.value)


@settings(CHECKED, max_examples=max(10, PLANS // 12))
@given(manifests(), workloads, machines, st.sampled_from(["VRAM", "RAM", "memory"]), st.data())
def test_smaller_plans_come_to_an_end(model, work, machine, resource, data) -> None:
    found = attempt(model, work, machine)
    if found is None:
        return
    phase = data.draw(st.sampled_from([p.name for p in found.phases]))
    names = ("context", "denoise") if phase in ("context", "denoise") else (phase,)

    def measure(which: Plan) -> int:
        peaks = [(which[name].vram_bytes, which[name].ram_bytes) for name in names]
        index = {"VRAM": 0, "RAM": 1}.get(resource)
        return max(sum(peak) if index is None else peak[index] for peak in peaks)

    for _ in range(200):
        less = smaller(model, work, machine, found, phase, resource)
        if less is None:
            if resource != "memory":
                assert not takes_less(model, work, machine, names[-1], resource, measure(found))
            break
        assert measure(less) < measure(found)
        assert less.peak_vram_bytes <= machine.vram_bytes
        assert less.peak_ram_bytes <= machine.ram_bytes
        found = less
    else:
        pytest.fail("no end in sight")


def takes_less(model, work, machine, name: str, resource: str, nbytes: int) -> bool:
    """Whether any shape of the phase takes fewer bytes of a resource."""
    limits = Limits(machine.vram_bytes, machine.ram_bytes)
    less = replace(limits, **{f"{resource.lower()}_bytes": nbytes - 1})
    (step,) = (step for step in steps(model, work, machine, Policy()) if name in step.phases)
    return any(group_fits(group, less) for group in step.all_small(less))


@pytest.mark.parametrize("resource", ["VRAM", "RAM"])
def test_a_smaller_plan_takes_less_of_what_ran_out(resource: str) -> None:
    machine, model = described("4090", "64GiB", None), builtin("wan2.1-i2v-14b", "int8")
    work = Workload(VideoShape(832, 480, 17), 4, True)
    found = without_prefetch(plan(model, work, machine), model.prefetch)
    less = smaller(model, work, machine, found, "denoise", resource)
    assert less is not None
    before, after = (
        each["denoise"].vram_bytes if resource == "VRAM" else each["denoise"].ram_bytes
        for each in (found, less)
    )
    assert after <= SHRINK * before


def test_a_pinned_share_that_is_too_small_is_named() -> None:
    from penstock.engine.family.protocol import builtin
    from penstock.profiles.cards import described

    machine = described("RTX 3060 12GB", "32GiB", None)
    work = Workload(VideoShape(832, 480, 81), 40, True)
    with pytest.raises(OverBudget) as refused:
        plan(builtin("wan2.1-i2v-14b", "int8"), work, machine, pinned_bytes=100 << 20)
    assert refused.value.resource == "pinned RAM"
    assert refused.value.limit_bytes == 100 << 20


class TestAdvice:
    """What a refusal names, and what a plan says of its format."""

    def chosen(self, vram: str | None, ram: str | None = None, name: str = "12gb"):
        from penstock.profiles.cards import described
        from penstock.profiles.options import Options
        from penstock.profiles.profile import choose, load

        return choose(load(name), Options(vram=vram, ram=ram), described("4090", None, None))

    def refused(self, work: Workload, chosen) -> OverBudget:
        from penstock.engine.family.protocol import builtin
        from penstock.profiles.advice import plan_chosen

        with pytest.raises(OverBudget) as found:
            plan_chosen(lambda stored: builtin("wan2.1-i2v-14b", stored), work, chosen)
        return found.value

    def test_upright_videos_are_made_smaller_upright(self) -> None:
        work = Workload(VideoShape(720, 1280, 17), 40, True)
        assert "--size 480x832" in str(self.refused(work, self.chosen("1.15GiB")))

    def test_nothing_fits(self) -> None:
        error = self.refused(Workload(VideoShape(480, 832, 17), 40, True), self.chosen("50MiB"))
        assert "--profile 4gb" in str(error) and "--size" not in str(error)
        error = self.refused(Workload(VideoShape(8192, 8192, 161), 40, True), self.chosen("50MiB"))
        assert "no profile and no shorter or smaller video does" in str(error)

    def test_a_folder_has_one_format_and_is_tried_once(self) -> None:
        from penstock.engine.family.protocol import builtin
        from penstock.profiles.advice import plan_chosen

        only = builtin("wan2.1-i2v-14b", "bf16")
        work = Workload(VideoShape(832, 480, 17), 4, False)
        found = plan_chosen(lambda _: only, work, self.chosen(None))
        (origin,) = [each for each in found.origins if each.name == "format"]
        assert (origin.value, origin.source) == ("bf16", "the model's files")
        with pytest.raises(OverBudget):
            plan_chosen(lambda _: only, work, self.chosen("50MiB"))


def test_weights_in_all() -> None:
    from penstock.engine.family.protocol import builtin

    weights = builtin("wan2.1-i2v-14b", "bf16").text.weights
    assert weights.total_bytes == weights.rest_bytes + 24 * weights.block_bytes[0]


def test_changes_are_told() -> None:
    from penstock.engine.family.protocol import builtin
    from penstock.profiles.cards import described
    from penstock.profiles.plan import changes

    machine = described("4090", None, None)
    model, work = builtin("wan2.1-i2v-14b", "int8"), Workload(VideoShape(832, 480, 17), 4, True)
    one = plan(model, work, machine, Policy(cross_kv="vram", branches=2))
    other = plan(model, work, machine, Policy(cross_kv="ram", branches=1))
    told, identical = changes(one, other)
    assert identical
    assert "1 CFG branches a visit instead of 2 CFG branches a visit" in told
    assert changes(one, one) == ((), True)
    assert one["denoise"].passes(2) == [range(0, 2)]
    assert not changes(one, plan(model, work, machine, Policy(chunk_tokens=64)))[1]


@CHECKED
@given(manifests(), workloads, machines, policies)
def test_attention_in_8_bits_is_never_predicted_slower_where_its_rate_is_higher(
    model, work, machine, policy
) -> None:
    """Of each shape; what a chunk quantises is left out (`memory_bytes_per_s`)."""
    rates = machine.rates
    faster = replace(
        rates,
        int8_attention_flops=1.5 * (rates.attention_flops or rates.flops),
        memory_bytes_per_s=None,
    )
    sdpa, int8 = (
        Denoise(Case(model, work, faster, replace(policy, attention=name), machine.device))
        for name in ("sdpa", "int8")
    )

    def seconds(step: Denoise) -> dict[object, float]:
        return {
            replace(shape.cost, attention=""): shape.compute_s * shape.passes
            for shape in step._shapes
        }

    before, after = seconds(sdpa), seconds(int8)
    assert before.keys() == after.keys()
    assert all(after[shape] < before[shape] for shape in before)


@CHECKED
@given(manifests(), workloads, machines, policies)
def test_attention_in_8_bits_takes_no_less_memory(model, work, machine, policy) -> None:
    sdpa, int8 = (replace(policy, attention=name) for name in ("sdpa", "int8"))
    case = Denoise(Case(model, work, machine.rates, sdpa, machine.device))
    other = Denoise(Case(model, work, machine.rates, int8, machine.device))
    less = {replace(shape.cost, attention=""): shape.work_bytes for shape in case._shapes}
    for shape in other._shapes:
        assert shape.work_bytes >= less[replace(shape.cost, attention="")]


def test_where_the_rate_in_8_bits_is_unknown_that_in_16_counts() -> None:
    rates = Rates(1e12, 1e10, 1e9, attention_flops=2e12)
    assert rates.self_attention_flops("int8") == rates.self_attention_flops("sdpa") == 2e12
    known = replace(rates, int8_attention_flops=5e12)
    assert (known.self_attention_flops("int8"), known.self_attention_flops("sdpa")) == (5e12, 2e12)
    assert Rates(1e12, 1e10, 1e9).self_attention_flops("int8") == 1e12


def test_attention_in_8_bits_on_a_known_card() -> None:
    machine, work = described("4090", None, None), Workload(VideoShape(1280, 720, 81), 4, True)
    fixed = Policy(chunk_tokens=2048, branches=1, cross_kv="vram")
    sdpa, int8 = (
        plan(builtin("wan2.1-i2v-14b", "int8"), work, machine, replace(fixed, attention=name))
        for name in ("sdpa", "int8")
    )
    assert (sdpa.attention, int8.attention) == ("sdpa", "int8")
    assert "int8_attention" not in dict(sdpa["denoise"].work)
    counted = int8_attention_bytes(40, 128, 2048, 75_600, 2)
    assert dict(int8["denoise"].work)["int8_attention"] == counted
    # Attention is 4 n n d a block, forward and step; the card's int8 peak is four times bf16's.
    assert machine.rates.int8_attention_flops == machine.rates.eight_bit_flops
    operations, chunks = 8 * 40 * 4 * 75_600**2 * 5120, 8 * 40 * 37
    saved = operations * (1 / machine.rates.flops - 1 / machine.rates.int8_attention_flops)
    # Each chunk reads keys once and values twice (16 bits) and writes both (8 bits).
    requantised = chunks * 75_600 * 5120 * (3 * 2 + 2) / machine.rates.memory_bytes_per_s
    difference = sdpa["denoise"].seconds - int8["denoise"].seconds
    assert difference == pytest.approx(saved - requantised, rel=0.01)


def test_each_kind_of_8_bit_product_has_its_own_rate() -> None:
    machine, work = described("4090", None, None), Workload(VideoShape(832, 480, 17), 4, True)
    policy = Policy(compute="fast", chunk_tokens=4096, branches=2, cross_kv="vram")
    seconds = {
        name: plan(builtin("wan2.1-i2v-14b", name), work, machine, policy)["denoise"].seconds
        for name in ("int8", "fp8")
    }
    assert machine.rates.eight_bit_flops == pytest.approx(2 * machine.rates.fp8_flops, rel=0.01)
    assert seconds["fp8"] > 1.15 * seconds["int8"]
