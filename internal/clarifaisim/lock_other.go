//go:build !unix

package clarifaisim

import "os"

// lockState does nothing where there are no such locks.
func lockState(string) (*os.File, error) { return nil, nil }
