"""What fewer bits cost and gain; `python -m bench.precision`.

opticks.txt: 20 kB of English, from Question 28 on of Isaac Newton's "Opticks", fourth edition, London 1730, which is in
the public domain everywhere; as Project Gutenberg has it, without line breaks and marks of emphasis.
"""
