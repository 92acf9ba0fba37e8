DROP TABLE manual_pause;
