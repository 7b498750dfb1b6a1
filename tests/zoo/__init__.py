"""The zoo: tiny random models of many libraries, and a walk over them that counts what the backend catches.

`python -m tests.zoo` prints the table and writes `results.json`, from which the README's table is made.
"""
