"""Operators on points, in torch alone; each has a naive twin in the tests."""
from ewa3d.ops.ball import ball_query
from ewa3d.ops.chamfer import chamfer_distance, nearest_squared
from ewa3d.ops.interpolate import interpolate
from ewa3d.ops.points import check_points, fps, gather, knn, neighbours
from ewa3d.ops.pooling import patch_max

__all__ = ['fps', 'knn', 'neighbours', 'ball_query', 'gather', 'check_points', 'patch_max', 'chamfer_distance',
           'nearest_squared', 'interpolate']
