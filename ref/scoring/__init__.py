"""phi and R: perceptual spaces and rewards, by name.

own              rewards and encoders of one's own, FILE.py:NAME
encoders         phi: PickScore, CLIP, DINOv2, SigLIP, HPSv2, open_clip
reward           what all rewards share
preference       networks that judge: the cosine of image and text, the aesthetic predictor
image_reward     ImageReward, a BLIP of its own
served           rewards that a server gives, one's own too
unified_reward   UnifiedReward, a vision-language model behind a server
geneval          GenEval's rules on the objects that a Mask2Former finds
rules            rewards that a rule computes: text that can be read (OCR), compressibility
load             names and weighted sums of them, such as pickscore:0.7+ocr:0.3
"""
