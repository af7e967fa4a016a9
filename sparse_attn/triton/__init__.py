"""The ops in Triton. The package works without Triton: `support` says whether it can run, and
`entry` imports the kernels at the first call that needs them.
"""
