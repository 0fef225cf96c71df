"""What a model is, and how to make it smaller."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "models.architectures": ["ARCHITECTURES", "Architecture", "find_architecture"],
        "models.depth": ["Depth"],
        "models.families": ["Family"],
        "models.resolution": ["Resolution"],
        "models.module_map": ["ModuleMap", "make_module_map"],
        "checkpoints.folder": ["checkpoint_hash"],
        "checkpoints.load": ["load_component", "load_pipeline"],
        "checkpoints.sources": ["resolve"],
        "checkpoints.surgery": ["make_student_unet"],
        "data.cache": ["LatentCache"],
        "data.make_cache": ["make_cache"],
        "training.objectives": ["Distill"],
        "training.options": ["TrainOptions"],
        "training.recipes": ["RECIPES", "Recipe", "Stage", "find_recipe"],
        "training.schedule": ["Schedule"],
        "training.student": ["Lora", "Pruned"],
        "training.trainer": ["train"],
        "common.errors": ["UserError"],
    },
)
