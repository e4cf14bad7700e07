"""Taking a model elsewhere, proven: Hugging Face folders and GGUF files, and back from a Llama-family folder."""
