"""The operations, on tensors and plain integers; `dispatch` picks an implementation."""
