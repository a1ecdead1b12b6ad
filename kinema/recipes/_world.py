"""What the recipes of the embedded world share: what is trained on, and what is shown while it is."""

from kinema.data.scenes import SHAPES
from kinema.data.sprites import World

# Codec and text encoder know the novel shape, as those of real models know more than the model was trained on.
EVERYTHING = World(shapes=SHAPES, one=0.6, two=0.25, behind=0.15)
TRAINED = World(one=0.75, two=0.15, behind=0.1)
PROMPTS = (
    "a big red circle moves left on a black background",
    "a small green star bounces on a navy background",
    "a big yellow cross orbits on a grey background",
    "a small blue square moves up on a brown background",
)
