"""The router: where clients call in. Text becomes tokens here, a pair of workers is picked, tokens become text."""
