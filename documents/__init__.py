"""What makes the parts of the documents that no hand writes: the film, and the page of commands."""
