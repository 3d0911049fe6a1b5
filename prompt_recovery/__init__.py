"""Recover the prompt that an LLM was given from a text and its rewrite.

Nothing is imported here, so that `import prompt_recovery` stays cheap and touches no GPU; import
the modules you need.
"""

__version__ = "0.1.0"
