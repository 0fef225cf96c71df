"""What a model is, and how to make it smaller."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "models.architectures": ["ARCHITECTURES", "Architecture", "Depth", "Family", "Resolution", "find_architecture"],
        "data.cache": ["LatentCache", "make_cache"],
        "common.errors": ["UserError"],
        "models.layer_map": ["make_layer_map"],
        "training.options": ["TrainOptions"],
        "training.recipes": ["RECIPES", "LossWeights", "Recipe", "Stage", "find_recipe"],
        "models.sources": ["checkpoint_hash", "load_component", "load_pipeline", "resolve"],
        "models.surgery": ["make_student_unet"],
        "training.trainer": ["train"],
    },
)
