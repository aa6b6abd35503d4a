"""Hardware of mixed FP4 and FP8 tiles: bit-true models, RTL (``rtl/*.sv``) and energies."""
