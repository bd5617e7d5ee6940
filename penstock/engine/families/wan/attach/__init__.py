"""diffusers' Wan pipelines, their networks replaced by parts that stream."""
