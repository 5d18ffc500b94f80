"""The two computations that every mixture of LoRA experts is made of, each with a slow and a fast implementation.

Tensors only: nothing here knows a backbone, a router or a module.
"""
