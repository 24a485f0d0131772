"""LoRA and QLoRA: adapters that recover a compressed model (`adapter_stage`), and the two methods that train them."""
