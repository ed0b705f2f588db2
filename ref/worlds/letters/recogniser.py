"""An independent reader: RapidOCR's recogniser (PP-OCR), which nobody here trained.

Its ONNX model comes inside the wheel, so nothing is downloaded. The detector is left out: the whole picture is
taken for one line of text, scaled to the 48 pixels that the recogniser expects.
"""

import torch
from jaxtyping import Float
from torch import Tensor


class Recogniser:
    """Images -> what is read in them, and how sure the recogniser is."""

    def __init__(self, batch: int = 64):
        from rapidocr import RapidOCR
        from rapidocr.ch_ppocr_rec.typings import TextRecInput

        engine = RapidOCR(
            params={
                "Global.log_level": "critical",
                "Global.use_det": False,
                "Global.use_cls": False,
                "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),
                "Rec.rec_img_shape": [3, 48, 48],  # one letter, not a line of 320 pixels
                "Rec.rec_batch_num": batch,
            }
        )
        self.engine, self.request = engine._load_rec_model(), TextRecInput

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> tuple[list[str], Float[Tensor, " B"]]:
        pictures = (images.flip(1).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()  # BGR
        said = self.engine(self.request(img=list(pictures)))
        return [text.strip() for text in said.txts], torch.tensor(said.scores, dtype=torch.float32)
