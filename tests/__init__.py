"""The tests mirror ref/: ref/scale/microbatch.py is tested by tests/scale/test_microbatch.py.

tools.py and small.py hold what several of them share; claims/ tests proofs/.
"""
