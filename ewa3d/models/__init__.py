"""Models: backbone, necks, heads and the task model that holds them. Importing registers them."""
from ewa3d.models import backbone, heads, necks, preprocessor, task

__all__ = ['backbone', 'heads', 'necks', 'preprocessor', 'task']
