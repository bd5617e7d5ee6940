"""The directory of a job: everything that outlives its process."""
