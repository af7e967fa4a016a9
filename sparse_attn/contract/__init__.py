"""What every backend is given, and what it promises: the bundle of a call's arguments, the request
by which a backend accepts or refuses a call, packed sequences, dtypes, and the shapes of results.
"""
