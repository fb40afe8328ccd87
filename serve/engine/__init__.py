"""The engine: many images at once, of any variant, by unmodified pipelines whose transformer calls are batched.

No Ray in it: it runs in a test, in a script, or as a replica.
"""
