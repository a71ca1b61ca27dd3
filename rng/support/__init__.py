"""What any image model needs: files, data sets, noise, training runs, devices, errors."""
