"""What lies around the scan and the attention of a block: RoPE, the mix of the branches, narrow products.

`operator` has what is registered, `torch_engine` the equations of RoPE and the mix, `kernels` their Triton
engine, `narrow_product` the products with a few columns, which are the library's on both engines.
"""
