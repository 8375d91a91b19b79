"""Loading a large model, and running one that is larger than memory; see __main__."""
