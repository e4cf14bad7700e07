"""Models on the Hugging Face hub: `fetch` and `download` bring a checkpoint here, `card` and `upload` publish one."""
