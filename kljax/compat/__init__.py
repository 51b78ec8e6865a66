"""Other systems' KL losses with their own signatures, orders and numbers: one module for each."""
