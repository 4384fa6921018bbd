"""FLOW export: plan → write → load again → measure → appear. A merged model in the files that other programs load.

    hf          safetensors in 16 bits, for transformers, vLLM and most others
    nf4         the same with bitsandbytes' 4-bit weights, for transformers and vLLM
    gguf        one file for llama.cpp and Ollama
    gguf-lora   the adapter alone, for llama.cpp beside its base's GGUF

Runs with no server.
"""
