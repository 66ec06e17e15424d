"""CPU optimizations, applied to models from outside: packed and quantized weights, attention, memory."""
