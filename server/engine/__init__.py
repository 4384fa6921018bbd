"""The seam to an inference engine: what we ask of one (protocol), the real one (vllm), and a fake for fast tests."""
