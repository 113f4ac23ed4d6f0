// Package volume keeps named directories of a node that outlive the tasks they
// are mounted in: Docker's volumes of the driver local.
package volume

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/shoalnet/shoal/spec"
)

// ErrNotFound answers for a volume that is not there.
var ErrNotFound = errors.New("no such volume")

// Volume is one of them.
type Volume struct {
	Name    string            `json:"name"`
	Labels  map[string]string `json:"labels,omitempty"`
	Created time.Time         `json:"created"`
	// Anonymous: made for one task that named none, and removed with it.
	Anonymous bool `json:"anonymous,omitempty"`
	// Task is the ID of that task. Earlier versions kept none.
	Task string `json:"task,omitempty"`
	// Path is the directory that is mounted. It is not kept.
	Path string `json:"-"`
}

// Store is a directory of volumes: NAME/_data, as Docker has it, beside
// NAME/volume.json. It is safe for concurrent use.
type Store struct {
	Dir string
	mu  sync.Mutex
}

const metaFile = "volume.json"

func (s *Store) path(name string) string { return filepath.Join(s.Dir, name) }

// Create makes a volume; one that is there already is returned as it is. With a task, by
// its ID, it is for that alone.
func (s *Store) Create(name string, labels map[string]string, task string) (v Volume, made bool, err error) {
	if err := spec.ValidateVolumeName(name); err != nil {
		return Volume{}, false, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if v, err := s.get(name); err == nil {
		return v, false, nil
	} else if !errors.Is(err, ErrNotFound) {
		return Volume{}, false, err
	}
	v = Volume{Name: name, Labels: labels, Created: time.Now(), Anonymous: task != "", Task: task}
	b, err := json.Marshal(v)
	if err != nil {
		return Volume{}, false, err
	}
	// Whole or not at all: it is made aside and renamed.
	if err := os.MkdirAll(s.Dir, 0o711); err != nil {
		return Volume{}, false, fmt.Errorf("volume %s: %w", name, err)
	}
	tmp, err := os.MkdirTemp(s.Dir, ".new-")
	if err != nil {
		return Volume{}, false, fmt.Errorf("volume %s: %w", name, err)
	}
	defer os.RemoveAll(tmp)
	err = errors.Join(os.Chmod(tmp, 0o701), os.Mkdir(filepath.Join(tmp, "_data"), 0o755), os.Chmod(filepath.Join(tmp, "_data"), 0o755),
		os.WriteFile(filepath.Join(tmp, metaFile), b, 0o600))
	if err == nil {
		// What an earlier life left without a record is in the way.
		err = errors.Join(os.RemoveAll(s.path(name)), os.Rename(tmp, s.path(name)))
	}
	if err != nil {
		return Volume{}, false, fmt.Errorf("volume %s: %w", name, err)
	}
	v.Path = filepath.Join(s.path(name), "_data")
	return v, true, nil
}

// Get returns a volume, or ErrNotFound.
func (s *Store) Get(name string) (Volume, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.get(name)
}

func (s *Store) get(name string) (Volume, error) {
	if spec.ValidateVolumeName(name) != nil {
		return Volume{}, fmt.Errorf("%w: %s", ErrNotFound, name)
	}
	data := filepath.Join(s.path(name), "_data")
	if _, err := os.Stat(data); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return Volume{}, fmt.Errorf("%w: %s", ErrNotFound, name)
		}
		return Volume{}, fmt.Errorf("volume %s: %w", name, err)
	}
	v := Volume{}
	if b, err := os.ReadFile(filepath.Join(s.path(name), metaFile)); err != nil || json.Unmarshal(b, &v) != nil {
		// The data is what counts: a record that is damaged says less, no more.
		v = Volume{}
		if fi, err := os.Stat(data); err == nil {
			v.Created = fi.ModTime()
		}
	}
	v.Name, v.Path = name, data
	return v, nil
}

// List returns all volumes, by name.
func (s *Store) List() ([]Volume, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	es, err := os.ReadDir(s.Dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list volumes: %w", err)
	}
	var out []Volume
	for _, e := range es {
		if v, err := s.get(e.Name()); err == nil {
			out = append(out, v)
		}
	}
	slices.SortFunc(out, func(a, b Volume) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

// Remove takes a volume and its data away. ErrNotFound when it is not there.
func (s *Store) Remove(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := s.get(name); err != nil {
		return err
	}
	// Out of sight at once: a crash half way leaves no volume with half its data.
	gone, err := os.MkdirTemp(s.Dir, ".gone-")
	if err != nil {
		return fmt.Errorf("remove volume %s: %w", name, err)
	}
	if err := os.Rename(s.path(name), filepath.Join(gone, name)); err != nil {
		return fmt.Errorf("remove volume %s: %w", name, errors.Join(err, os.Remove(gone)))
	}
	if err := os.RemoveAll(gone); err != nil {
		return fmt.Errorf("remove volume %s: %w", name, err)
	}
	return nil
}

// Sweep clears what a crash left half made or half removed. Call it before use.
func (s *Store) Sweep() error {
	es, err := os.ReadDir(s.Dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	var errs []error
	for _, e := range es {
		if strings.HasPrefix(e.Name(), ".new-") || strings.HasPrefix(e.Name(), ".gone-") {
			errs = append(errs, os.RemoveAll(filepath.Join(s.Dir, e.Name())))
		}
	}
	return errors.Join(append(errs, err)...)
}
