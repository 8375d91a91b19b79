"""What handing a prompt over costs: a prefill worker by itself, beside the same one with a decode worker behind it."""
