"""`Kept`: which patches are left of a picture or video; `Origin`: what a row of tokens shows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["image", "video"]


@dataclass(frozen=True)
class Origin:
    """Picture or video, or crop or frame of one, that a row of visual tokens shows.

    Attributes:
        number: number of the picture among the pictures of a call, or of the video among its
            videos, counted from 0 in the order in which they were given.
        kind: ``"image"`` or ``"video"``.
        crop: crop that the row starts with (frame, of a video); 0 is the first.
        patches_per_crop: number of patches of a crop, where a row holds several: its patch p is
            patch `p % patches_per_crop` of crop `crop + p // patches_per_crop`. None where a row
            is one crop.
    """

    number: int
    kind: Kind = "image"
    crop: int = 0
    patches_per_crop: int | None = None

    @property
    def order(self) -> tuple[bool, int]:
        """Sorts pictures first and then videos, each in the order in which they were given."""
        return self.kind == "video", self.number


@dataclass(frozen=True)
class Kept:
    """Tokens that are left of one picture or video, by where they come from.

    The two tuples have one entry for each token that is left. Of a merged token, they say where its
    anchor comes from, the first of its members.

    Attributes:
        kind: ``"image"`` or ``"video"``.
        number: number of the picture among the pictures of the call, or of the video among its
            videos, counted from 0 in the order in which they were given.
        crop: crop that each token is of: 0 is the base view, or the whole of a picture that is not
            cut; of a video, the frame.
        patch: patch of that crop or frame that each token is, in raster order.

    >>> Kept("image", 0, crop=(0, 0, 2), patch=(5, 7, 7)).of(2)
    (7,)
    """

    kind: Kind
    number: int
    crop: tuple[int, ...]
    patch: tuple[int, ...]

    @classmethod
    def at(cls, origin: Origin, patches: Iterable[int]) -> Kept:
        """What is left of a row that shows `origin`: tokens that are `patches` of it.

        >>> Kept.at(Origin(0, patches_per_crop=16), [3, 16, 17])
        Kept(kind='image', number=0, crop=(0, 1, 1), patch=(3, 0, 1))
        """
        size = origin.patches_per_crop
        pairs = [(0, each) if size is None else divmod(each, size) for each in patches]
        return cls(
            origin.kind,
            origin.number,
            tuple(origin.crop + crop for crop, _ in pairs),
            tuple(patch for _, patch in pairs),
        )

    def __len__(self) -> int:
        return len(self.patch)

    def __add__(self, other: Kept) -> Kept:
        """What is left of two rows of one picture or video."""
        crop, patch = self.crop + other.crop, self.patch + other.patch
        return Kept(self.kind, self.number, crop, patch)

    @property
    def frame(self) -> tuple[int, ...]:
        """Frame that each token of a video is of; another name for `crop`."""
        return self.crop

    def of(self, crop: int) -> tuple[int, ...]:
        """Patches that are left of one crop, or of one frame."""
        pairs = zip(self.crop, self.patch, strict=True)
        return tuple(patch for each, patch in pairs if each == crop)
