"""What chooses the codes and scales of a weight: rounding to nearest, SmoothQuant, AWQ, GPTQ."""
