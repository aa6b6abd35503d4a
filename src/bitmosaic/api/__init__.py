"""The verbs of bitmosaic as functions: what the command line calls and what users import.

Each takes paths and plain values, opens what they name, and calls one stage.  Use them as
`bitmosaic.quantize` and so on; this package imports nothing, so that `inspect` need not wait for
transformers.
"""
