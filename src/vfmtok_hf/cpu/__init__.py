"""What makes CPUs fast, bound to models from outside: packed and quantized weights, attention, memory."""
