"""The form of the model that is fast: one product for q, k and v, steps between products fused, and
weights in the layout in which a device multiplies them best. cpu/ and gpu/ fill it with kernels."""
