"""Model files: what a person names is resolved to a checkpoint, whose tensors are read one at a time.

source.open_checkpoint     a directory, a .gguf file or a Hub id -> Checkpoint
checkpoint.Checkpoint      the seam: config, files, tensors under Hugging Face's names
hf_directory, gguf_file    its two formats
stored.StoredMatrix        what a parameter is to be, not read yet
pages.release_pages        what was read of a mapped file need not stay in memory
digest.model_digest        what tells two models apart
"""
