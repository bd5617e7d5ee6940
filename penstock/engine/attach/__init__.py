"""penstock inside other tools: any module with a list of blocks, and diffusers' own pipelines."""
