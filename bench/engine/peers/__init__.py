"""The adapters that peers run: nothing of ours is imported here but the adapter itself."""
