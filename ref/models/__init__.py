"""diffusers' text-to-image models behind a few names: encode, velocity, decode, what is trained, how it is saved.

adapter      the names, and all that SD3 and FLUX have in common
sd3, flux    an architecture each: its velocity, latents, text encoding. A third one is a third file
load         a pipeline ready to be trained, from a folder or the hub
stock        diffusers' own pipeline, drawn as training draws
lora         a LoRA, or all weights, put into a pipeline of diffusers
hub          where a pipeline comes from, and what can go wrong on the way
embeddings   prompts' embeddings, computed once and kept on disk
prompts/     the prompt files of this package, and their reader
shapes       the large architectures without weights
tiny         complete pipelines of the real classes with random weights
push         weights to the hub
card         the model card beside saved weights
"""
