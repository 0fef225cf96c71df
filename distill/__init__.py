"""What a model is, and how to make it smaller."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "architectures": ["ARCHITECTURES", "Architecture", "Depth", "Family", "Resolution", "find_architecture"],
        "cache": ["LatentCache", "make_cache"],
        "errors": ["UserError"],
        "layer_map": ["make_layer_map"],
        "options": ["TrainOptions"],
        "recipes": ["RECIPES", "LossWeights", "Recipe", "Stage", "find_recipe"],
        "sources": ["checkpoint_hash", "load_component", "load_pipeline", "resolve"],
        "surgery": ["make_student_unet"],
        "trainer": ["train"],
    },
)
