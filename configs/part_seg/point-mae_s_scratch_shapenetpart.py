# The same from scratch.
_base_ = ['point-mae_s_ft_shapenetpart.py']
model = dict(pretrained=None)
