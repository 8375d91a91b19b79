"""Our engine and every peer that is installed, measured in turns within one run: `python -m bench.engine`."""
