"""Make it fit and make it fast: memory plans, quantized and streamed weights, packed matrices, recorded steps, many processes."""
