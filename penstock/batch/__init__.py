"""Lists of requests, made one after the other or on several workers, each once."""
