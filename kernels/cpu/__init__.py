"""Block-sparse attention on the CPU, with and without a C++ compiler."""
