"""The server: ``/v1/videos``, a queue that survives, events, and workers that do the jobs."""
