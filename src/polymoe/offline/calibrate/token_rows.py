"""What one variant reads in a pass over text: rows of token ids, of an encoder–decoder model for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

NO_TOKEN = -1
MIN_TOKENS = 256  # a variant; below, statistics say nothing


@dataclass(frozen=True, eq=False)
class TokenRows:
    """`windows` int64 [n, length]: what the decoder reads. `inputs` int64 [n, longest]: what an encoder reads for each,
    None for a decoder-only model. Rows that are shorter end in `NO_TOKEN`."""

    windows: Tensor
    inputs: Tensor | None = None

    @classmethod
    def of_pairs(cls, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> TokenRows:
        """`pairs`: ids of the encoder and of the decoder for each row."""
        inputs, windows = (
            pad_sequence([torch.tensor(ids) for ids in side], batch_first=True, padding_value=NO_TOKEN)
            for side in zip(*pairs, strict=True)
        )
        return cls(windows, inputs)

    def __len__(self) -> int:
        return len(self.windows)

    def spread(self, count: int) -> TokenRows:
        """At most `count` rows, at even distances."""
        chosen = slice(None, None, max(1, len(self) // count))
        return TokenRows(self.windows[chosen][:count], None if self.inputs is None else self.inputs[chosen][:count])

    def followed_by(self, other: TokenRows, copies: int) -> TokenRows:
        """These rows and then `copies` times those of `other`, which are as long."""
        inputs = None
        if self.inputs is not None and other.inputs is not None:
            inputs = torch.cat([self.inputs, *[other.inputs] * copies])
        return TokenRows(torch.cat([self.windows, *[other.windows] * copies]), inputs)

    def real(self, encoder: bool = False) -> Tensor:
        """bool [n, length]: where there is a token of the decoder, or of the encoder."""
        side = self.inputs if encoder else self.windows
        assert side is not None
        return side != NO_TOKEN

    def count(self, encoder: bool = False) -> int:
        """Tokens of the decoder, or of the encoder."""
        return int(self.real(encoder).sum())

    def model_arguments(self) -> dict[str, Tensor]:
        """What the stock model takes."""
        if self.inputs is None:
            return {"input_ids": self.windows}
        return {
            "input_ids": self.inputs.clamp(min=0),
            "attention_mask": self.real(encoder=True).long(),
            "decoder_input_ids": self.windows.clamp(min=0),  # padding stands on the right: no token sees it
        }
