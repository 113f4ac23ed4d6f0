// Package imagefile makes images of one layer, of static programs, for tests and
// benchmarks: what they run needs no registry.
package imagefile

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
)

// File is one of a layer or an archive: a symbolic link if there is a Link, a directory if
// Data is nil.
type File struct {
	Name string
	Mode int64
	Data []byte
	Link string
}

// Image is an image of one layer.
type Image struct {
	Layer  []byte // a tar
	Config []byte // OCI image configuration
}

// New makes an image: config is the "config" of its configuration (OCI image-spec,
// config.md).
func New(arch string, config map[string]any, files ...File) (Image, error) {
	layer, err := pack(files)
	if err != nil {
		return Image{}, err
	}
	b, err := json.Marshal(map[string]any{"architecture": arch, "os": "linux", "config": config,
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + Sum(layer)}}})
	return Image{layer, b}, err
}

// Archive is an image under a name, as docker save writes it.
func (i Image) Archive(name string) ([]byte, error) {
	config, layer := Sum(i.Config)+".json", Sum(i.Layer)+"/layer.tar"
	manifest, err := json.Marshal([]map[string]any{{"Config": config, "RepoTags": []string{name}, "Layers": []string{layer}}})
	if err != nil {
		return nil, err
	}
	return pack([]File{{Name: config, Mode: 0o644, Data: i.Config}, {Name: layer, Mode: 0o644, Data: i.Layer}, {Name: "manifest.json", Mode: 0o644, Data: manifest}})
}

// Sum is the SHA-256 of b, in hex.
func Sum(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}

func pack(files []File) ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, f := range files {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: f.Name, Mode: f.Mode, Size: int64(len(f.Data))}
		switch {
		case f.Link != "":
			h.Typeflag, h.Linkname = tar.TypeSymlink, f.Link
		case f.Data == nil:
			h.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := w.Write(f.Data); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}
